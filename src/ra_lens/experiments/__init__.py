"""The experiments, each one function that gives a tidy table and can write it.

`rank_tasks`, `perturbation_test` and `patching_sweep`, the paper's, and `knockout_test` take a
model and tasks; with `out=` they write the table and, when they are killed, go on where they
stopped. With a folder as `out=` several processes share the work, and with `engine="ray"` a
cluster does it. `knockout_agreement` sums up a knockout test. `area_under_curve` sums up a
perturbation test, `bootstrap_intervals` says how sure its numbers are, and `compare_with_paper`
lays results beside the published numbers.
"""

from ra_lens.experiments.engines import RayEngine
from ra_lens.experiments.intervals import bootstrap_intervals, question_areas
from ra_lens.experiments.knockout import knockout_test
from ra_lens.experiments.paper import compare_with_paper, read_paper
from ra_lens.experiments.perturbation import area_under_curve, perturbation_test
from ra_lens.experiments.rank import rank_tasks
from ra_lens.experiments.sweep import patching_sweep
from ra_lens.knockouts.agreement import knockout_agreement
from ra_lens.scales import PAPER_SCALES
from ra_lens.tables import mean_over_questions, read_results, write_results

__all__ = [
    "PAPER_SCALES",
    "RayEngine",
    "area_under_curve",
    "bootstrap_intervals",
    "compare_with_paper",
    "knockout_agreement",
    "knockout_test",
    "mean_over_questions",
    "patching_sweep",
    "perturbation_test",
    "question_areas",
    "rank_tasks",
    "read_paper",
    "read_results",
    "write_results",
]
