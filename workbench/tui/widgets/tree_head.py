"""The line over the site tree that names its columns."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from dsv4_bench.workbench.tui.layout import TREE_COLUMNS, TREE_TITLES
from dsv4_bench.workbench.tui.widgets.site_tree import SiteTree


class TreeHead(Widget):
    def __init__(self, tree: SiteTree, id: str) -> None:
        super().__init__(id=id)
        self._tree = tree

    def render(self) -> Content:
        width = self._tree.scrollable_content_region.width
        columns = self._tree.columns(width)
        titles = "".join(TREE_TITLES[name].rjust(TREE_COLUMNS[name]) for name in columns)
        return Content(f"    {'op':<{max(0, width - 5 - len(titles))}}{titles}")
