"""`ra-lens circuits`, and masked heads that get something else in `ra-lens perturb`."""

from __future__ import annotations

import json

import pytest

from circuit_models import write_ioi_model
from command_line import call, refused_line
from ra_lens.experiments import circuit_test, perturbation_test, read_results
from ra_lens.model import load_folder

SMALL = ["-n", "4", "--methods", "michel", "atp", "random", "--random-orders", "2", "-q"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ioi_model(tmp_path_factory.mktemp("ioi"))


def test_it_prints_what_it_writes_and_that_is_what_the_function_gives(folder, tmp_path):
    out = tmp_path / "ioi.csv"
    heads = ["L0H1", "L1H2"]
    command = ["circuits", "--model", str(folder), *SMALL, "--heads", *heads, "-o", str(out)]
    printed = call(*command)
    assert printed.exit_code == 0, printed.output
    found = read_results(out)
    wanted = circuit_test(
        load_folder(folder), heads=heads, n=4, methods=["michel", "atp", "random"],
        random_orders=2, progress=False,
    )  # fmt: skip
    columns = ["method", "order", "draw", "auroc", "average_precision", "to_verify"]
    assert found[columns].values.tolist() == wanted[columns].values.tolist()
    assert "ioi: 2 of 6 heads (given)" in printed.stdout
    assert "True heads: L0H1 L1H2." in printed.stdout and str(out) in printed.stdout
    one = wanted.iloc[0]
    assert f"{one.auroc:.3f}" in printed.stdout
    told = json.loads(call(*command, "--json").stdout)  # found again
    assert told["true_heads"] == heads and told["circuit"] == "ioi" and told["out"] == str(out)
    means = {(row["method"], row["order"]): row["auroc"] for row in told["methods"]}
    assert means["michel", "signed"] == one.auroc
    assert means["random", "signed"] == wanted[wanted.method == "random"].auroc.mean()


def test_what_it_cannot_do_is_one_line(folder, tmp_path):
    model = ["circuits", "--model", str(folder), *SMALL]
    assert "The published list is of gpt2" in refused_line(*model, "--heads", "published")
    assert "there is no ranking method 'nope'" in refused_line("circuits", "--methods", "nope")
    assert ".parquet or .csv" in refused_line("circuits", "-o", str(tmp_path / "x.json"))
    assert call("circuits", "--circuit", "copying").exit_code == 2
    # The embedded model knows no names.
    assert "begin with the same token" in refused_line("circuits", "-n", "2")


@pytest.mark.every_model
def test_masked_heads_get_what_they_give_on_a_twin(tmp_path):
    from ra_lens.cli import session

    out = tmp_path / "a.csv"
    small = ["-t", "antonym", "--shots", "1", "--n-test", "3", "--n-rank", "2", "-q"]
    kept = ["--heads-kept", "4", "--others", "resample", "--methods", "index"]
    done = call("perturb", *small, *kept, "--metric", "answer_diff", "-o", str(out))
    assert done.exit_code == 0, done.output
    found = read_results(out)
    model = session.load("demo", None, None, debug=False)
    wanted = perturbation_test(
        model, "antonym", shots=1, n_test=3, n_rank=2, heads_kept=[4], others="resample",
        methods="index", progress=False,
    )  # fmt: skip
    assert found.answer_diff.tolist() == pytest.approx(wanted.answer_diff.tolist(), abs=1e-4)
    assert sorted(set(found.heads_kept)) == [0, 4, 32] and set(found.others) == {"resample"}
    assert call("perturb", *small, "--others", "noise").exit_code == 2
