"""Figures have one style and give the same bytes for the same numbers."""

from pathlib import Path

from gircse.reporting.figures import new_figure, new_panels, save_chart


def test_same_numbers_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        figure, axes = new_figure("title", x="x", y="y")
        axes.plot([1, 2, 3])
        (tmp_path / name).mkdir()
        contents.append([path.read_bytes() for path in save_chart(figure, tmp_path / name / "chart", formats=("png",))])
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"\x89PNG")


def test_there_is_one_panel_per_title(tmp_path: Path) -> None:
    figure, panels = new_panels("title", ["a", "b", "c"], columns=2)
    assert [axes.get_title() for axes in panels] == ["a", "b", "c"]
    assert len(figure.axes) == 3
    assert [path.name for path in save_chart(figure, tmp_path / "x.y", formats=("png", "svg"))] == [
        "x.y.png",
        "x.y.svg",
    ]
