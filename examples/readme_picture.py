"""The picture of the README: one head of the embedded model, its attention beside −R.

    python examples/readme_picture.py

Drawn by plotly, which needs kaleido (`pip install -e ".[images]"`) and a Chrome or Chromium. The
background is white, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path

from ra_lens import load_demo_model, run_with_ra
from ra_lens.figures import head_maps, save_figure

PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "italy.png"


def main() -> None:
    prompt = "Q: France\nA: Paris\n\nQ: Italy\nA:"
    _, ra = run_with_ra(load_demo_model(), prompt, target=" Rome")
    figure = head_maps(ra, [(0, 0)])
    save_figure(figure, PICTURE, width=900, scale=1.5)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
