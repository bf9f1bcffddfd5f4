"""The experiments, each one function that gives a tidy table and can write it.

`rank_tasks`, `perturbation_test` and `patching_sweep`, the paper's, `patching_ablations` and
`knockout_test` take a model and tasks; with `out=` they write the table and, when they are killed,
go on where they stopped. With a folder as `out=` several processes share the work, and with
`engine="ray"` a cluster does it. `knockout_agreement` sums up a knockout test, `ablation_effects`
ablations of patching. `faithfulness_test` says how well scores of heads foretell what taking one
head away does, from the table of `head_effect_table`, and `faithfulness_differences` compares them
in pairs. `area_under_curve` sums up a perturbation test, `head_only_cpr_cmd` says which heads
suffice, `bootstrap_intervals` how sure numbers are, and `compare_with_paper` lays results beside
the published ones. `circuit_test` asks how well rankings find the heads of a known circuit.
"""

from ra_lens.experiments.ablations import ablation_effects, patching_ablations
from ra_lens.experiments.circuits import circuit_heads, circuit_test
from ra_lens.experiments.engines import RayEngine
from ra_lens.experiments.faithfulness import faithfulness_test, head_effect_table
from ra_lens.experiments.head_only import head_only_cpr_cmd
from ra_lens.experiments.intervals import bootstrap_intervals, question_areas
from ra_lens.experiments.knockout import knockout_test
from ra_lens.experiments.paper import compare_with_paper, read_paper
from ra_lens.experiments.perturbation import MIB_SHARES, area_under_curve, perturbation_test
from ra_lens.experiments.rank import rank_tasks
from ra_lens.experiments.sweep import patching_sweep
from ra_lens.heads.agreement import faithfulness, faithfulness_differences
from ra_lens.knockouts.agreement import knockout_agreement
from ra_lens.scales import PAPER_SCALES
from ra_lens.tables import mean_over_questions, read_results, write_results

__all__ = [
    "MIB_SHARES",
    "PAPER_SCALES",
    "RayEngine",
    "ablation_effects",
    "area_under_curve",
    "bootstrap_intervals",
    "circuit_heads",
    "circuit_test",
    "compare_with_paper",
    "faithfulness",
    "faithfulness_differences",
    "faithfulness_test",
    "head_effect_table",
    "head_only_cpr_cmd",
    "knockout_agreement",
    "knockout_test",
    "mean_over_questions",
    "patching_ablations",
    "patching_sweep",
    "perturbation_test",
    "question_areas",
    "rank_tasks",
    "read_paper",
    "read_results",
    "write_results",
]
