"""Web pages in, documents out: what the sources `html`, `warc` and `deduplicate` share.

`dom` reads a page's text and images in order, `text_filters` decides what is kept, `documents` joins the two, and
`duplicates` counts what repeats over a corpus. Begin at `documents.web_document`.
"""
