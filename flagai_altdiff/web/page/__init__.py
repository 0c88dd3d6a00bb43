"""The page: where people draw."""

from flagai_altdiff.web.page.page import make_page

__all__ = ["make_page"]
