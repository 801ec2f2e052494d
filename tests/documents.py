"""The documents that people read, taken apart: headings, links, and commands to copy."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Document:
    """One Markdown file of the project."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def prose(self) -> str:
        """The text without its blocks of code, in which `#` is no heading and `[x](y)` no link."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)

    @property
    def headings(self) -> list[tuple[int, str]]:
        """Depth and words of each heading."""
        return [
            (len(marks), words) for marks, words in re.findall(r"^(#+) (.+)$", self.prose, flags=re.MULTILINE)
        ]

    @property
    def anchors(self) -> set[str]:
        return {anchor(words) for _, words in self.headings}

    @property
    def links(self) -> list[str]:
        """Where each link and picture leads, as it is written."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @property
    def commands(self) -> list[str]:
        """What people are told to copy into a shell."""
        return [block.text for block in self.blocks if block.language == "bash"]

    @property
    def blocks(self) -> list["Block"]:
        blocks, section = [], ""
        for language, body, heading in re.findall(
            r"^```(\w+)\n(.*?)\n```$|^## ([^\n]+)$", self.text, flags=re.DOTALL | re.MULTILINE
        ):
            section = heading or section
            if language:
                blocks.append(Block(section, language, body))
        return blocks


@dataclass(frozen=True)
class Block:
    """A block of code, and the section that it stands in."""

    section: str
    language: str
    text: str


def anchor(heading: str) -> str:
    """Return what GitHub makes of a heading for links to it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def tracked() -> list[str]:
    """Return the names of all files of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


DOCUMENTS = [Document(ROOT / name) for name in tracked() if name.endswith(".md")]
README = Document(ROOT / "README.md")
