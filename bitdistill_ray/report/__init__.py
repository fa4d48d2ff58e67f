"""`report.html`: one file that says what a run did, readable without a network.

Rows, tables and weights in (`gather`, `weights`), figures as inline SVG (`axis`, `chart`, `histogram`), text escaped in
one place (`markup`), and one page of them (`sections`, `page`).  No script, no font and no image is fetched.
"""
