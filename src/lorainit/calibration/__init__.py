"""What is measured on sequences that are held back: the length of a step, and steps taken again."""

from lorainit.calibration.line_search import LossAt, SearchResult, search_length

__all__ = ["LossAt", "SearchResult", "search_length"]
