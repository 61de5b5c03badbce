"""What a run looks like: pictures, terminal tables, the HTML report, the model card; all from the run document.

`graph`, `front` and `layers` draw with matplotlib's object API (no window, no global state); `tables` makes rich tables
and trees; `report` one self-contained HTML page; `card` the `README.md` of an artifact. Names and errors come from
outside: everything here cleans and escapes them. `graph.svg` and `graph.save` write any of the figures.
"""
