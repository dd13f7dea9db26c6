"""How the question → SQL data set was made.

    schemas.txt       68 databases with the words that people use for their columns, written by hand
    phrasings.py      the ways to ask, written by hand, different ones for train, validation and test
    tables.py         rows for the schemas, from a seed
    writer.py         a question and its query, from a table and a phrasing
    near_misses.py    the wrong queries that the rows must distinguish from the right one
    generate.py       all questions, from a seed; which candidates are kept

`python -m recipes.sql_questions` writes data/sql again, byte for byte.
"""
