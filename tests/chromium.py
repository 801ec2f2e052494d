"""Chromium without a window, and what it is asked about a page that everybody is to read and use."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from conftest import program

MOST_MILLISECONDS = 60_000
expect.set_options(timeout=MOST_MILLISECONDS)

RELATIVE_LUMINANCE = """
const parts = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => {
  const [r, g, b] = parts(color).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, other) => {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
};
const background = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if ((parts(color)[3] ?? 1) > 0) return color;
  }
  return "rgb(255, 255, 255)";
};
"""
TEXTS = f"""() => {{ {RELATIVE_LUMINANCE}
const seen = [];
for (const element of document.body.querySelectorAll("*")) {{
  const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
  if (own) seen.push([own, contrast(getComputedStyle(element).color, background(element))]);
}}
return seen;
}}"""
FOCUSED = f"""() => {{ {RELATIVE_LUMINANCE}
const element = document.activeElement, style = getComputedStyle(element);
if (element === document.body) return null;
return [element.textContent.trim(), style.outlineStyle, parseFloat(style.outlineWidth),
        contrast(style.outlineColor, background(element.parentElement))];
}}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program("chromium", "chromium"),
            args=["--no-sandbox"],
            timeout=2 * MOST_MILLISECONDS,
        )
        yield browser
        browser.close()
