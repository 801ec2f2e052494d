"""What the documents say of themselves, and what is made from the program: links, contents, settings, the picture."""

import re
from xml.etree import ElementTree

import pytest

import picture
import settings_reference
from documents import DOCUMENTS, README, ROOT, Document, anchor, tracked
from settings import Settings

OTHER_VARIABLES = {"OTEL_EXPORTER_OTLP_ENDPOINT", "SSH_MCP_ENV_FILE", "SSH_MCP_POLICY_LINES"}
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=[document.name for document in DOCUMENTS])


@documents
def test_every_link_leads_somewhere(document: Document) -> None:
    files = set(tracked())
    for link in document.links:
        if link.startswith("https://"):
            continue
        name, _, part = link.partition("#")
        path = (document.path.parent / name).resolve() if name else document.path
        relative = path.relative_to(ROOT).as_posix()
        assert relative in files or any(file.startswith(f"{relative}/") for file in files), link
        assert not part or part in Document(path).anchors, link


@documents
def test_every_heading_can_be_linked_to(document: Document) -> None:
    anchors = [anchor(words) for _, words in document.headings if document.name != "CHANGELOG.md"]
    assert len(set(anchors)) == len(anchors)


@documents
def test_each_command_stands_on_one_line(document: Document) -> None:
    assert not [command for command in document.commands if "\n" in command]


def test_contents_name_every_section_in_order() -> None:
    sections = [words for depth, words in README.headings if depth == 2]
    listed = re.findall(r"^- \[(.+)\]\(#(.+)\)$", README.text, flags=re.MULTILINE)
    assert sections[0] == "Contents"
    assert listed == [(words, anchor(words)) for words in sections[1:]]


def test_every_page_is_linked_from_the_readme() -> None:
    pages = {document.name for document in DOCUMENTS if document.name.startswith("docs/")}
    assert pages <= set(README.links)


def test_map_of_the_house_names_every_module_once() -> None:
    named = re.findall(r"^(\w+\.py) ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(name for name in tracked() if re.fullmatch(r"\w+\.py", name))


@documents
def test_variables_that_are_named_exist(document: Document) -> None:
    named = set(re.findall(r"`((?:[A-Z]+_)+[A-Z]+)[=`]", document.prose))
    assert named <= {name.upper() for name in Settings.model_fields} | OTHER_VARIABLES


def test_comparison_is_with_the_versions_that_its_script_installs() -> None:
    script = (ROOT / "benchmarks" / "others.py").read_text()
    versions = re.findall(r"\| ([\w-]+(?:@|==)[\d.]+) \(", (ROOT / "docs" / "comparison.md").read_text())
    assert len(versions) == 4
    assert [version for version in versions if f'"{version}"' in script] == versions


def test_readme_is_short_enough_to_read() -> None:
    assert len(README.text.splitlines()) < 600


def test_table_of_settings_is_that_of_the_program() -> None:
    assert settings_reference.with_table(README.text) == README.text, "run docs/settings_reference.py"


def test_example_of_a_settings_file_is_that_of_the_program() -> None:
    example = (ROOT / ".env.example").read_text()
    assert settings_reference.example() == example, "run docs/settings_reference.py"


def test_picture_shows_what_the_demo_prints() -> None:
    kept = picture.PICTURE.read_text()
    assert words_of(picture.drawn(picture.first_calls(picture.session()))) == words_of(kept)


def test_picture_needs_nothing_from_elsewhere() -> None:
    tree = ElementTree.fromstring(picture.PICTURE.read_text())
    assert not [node for node in tree.iter() if node.tag.endswith(("script", "image", "foreignObject"))]
    assert not re.search(r"url\((?!#)|@import|href=", picture.PICTURE.read_text())


def words_of(svg: str) -> list[str]:
    """Return the words of a picture; the port, the time that passed and the temporary folder differ in each run."""
    tree = ElementTree.fromstring(svg)
    text = " ".join("".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text"))
    text = text.replace("\xa0", " ")
    for pattern, word in ((r":\d+\]", ":PORT]"), (r"\d+\.\d\d s", "SECONDS"), (r"demo-\w{8}", "demo-FOLDER")):
        text = re.sub(pattern, word, text)
    return text.split()
