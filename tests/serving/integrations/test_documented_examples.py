"""Every example of docs/integrations.md runs, in the order of the page, with a small bundle under the demo's name."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "integrations.md"
EXAMPLES = [
    (section.partition("\n")[0], number, code)
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    for number, code in enumerate(re.findall(r"^```py\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
]


def test_every_library_has_an_example() -> None:
    libraries = {"LangChain", "LlamaIndex", "Haystack", "Chroma", "BERTopic"}
    assert {name for name, _, _ in EXAMPLES} == libraries | {"Code for sentence-transformers"}


@pytest.fixture(scope="module")
def directory(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "gircse-demo-8").symlink_to(bundle, target_is_directory=True)
    return folder


@pytest.mark.parametrize(("name", "number", "code"), EXAMPLES, ids=[f"{name}-{number}" for name, number, _ in EXAMPLES])
def test_an_example_runs(
    name: str,
    number: int,
    code: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "BERTopic":
        pytest.importorskip("bertopic", reason="with umap and numba (300 MB) it is not among the test packages")
    if name == "Code for sentence-transformers":
        pytest.importorskip("setfit", reason="SetFit is not among the test packages")
    monkeypatch.chdir(directory)
    exec(compile(code, f"{PAGE.name}: {name} {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
