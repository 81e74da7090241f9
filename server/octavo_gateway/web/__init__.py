"""The page at `/` and the live state it reads."""

from octavo_gateway.web.page import PAGE_HEADERS, page
from octavo_gateway.web.state import state_document

__all__ = ["PAGE_HEADERS", "page", "state_document"]
