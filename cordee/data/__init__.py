"""Files of rows, in one place: which files of a folder hold data, of which split, and what stands in each row.

`folder` finds the files of a source; `kinds` knows them by their names; `splits`, `saved` and `hub` know the splits,
which names, data sets saved by `datasets` and headers of hub repositories tell of. `rows` reads any of them as a stream
of rows (`row`), out of `tables` (Parquet, Arrow), `lines` (JSON, text) and `delimited` (CSV, TSV).
"""
