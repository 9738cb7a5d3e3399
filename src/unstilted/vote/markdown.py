"""Replies as safe HTML: Markdown without HTML, links or images, and then an allow-list of tags."""

from functools import lru_cache

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

TAGS = {"p", "br", "strong", "em", "s", "code", "pre", "blockquote", "ul", "ol", "li", "hr", "table", "thead", "tbody", "tr", "th", "td"}
_OFF = ["link", "image", "autolink", "html_inline", "html_block", "reference"]
_parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "typographer": False, "maxNesting": 20})
_parser = _parser.enable(["table", "strikethrough"]).disable(_OFF)


@lru_cache(maxsize=8192)
def to_html(text: str) -> str:
    """Safe HTML of a reply. Headings become strong paragraphs, because the page's own headings are its table of contents."""
    tokens = [_without_heading(token) for token in _parser.parse(text)]
    html = _parser.renderer.render(tokens, _parser.options, {})
    return nh3.clean(html, tags=TAGS, attributes={"ol": {"start"}}, url_schemes=set(), strip_comments=True).strip()


def _without_heading(token: Token) -> Token:
    if token.type == "heading_open":
        return token.copy(type="html_inline", tag="", nesting=0, content="<p><strong>")
    if token.type == "heading_close":
        return token.copy(type="html_inline", tag="", nesting=0, content="</strong></p>\n")
    return token
