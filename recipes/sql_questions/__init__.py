"""How the question → SQL data set was made: schemas, phrasings, rows, queries, and the check that rows tell them apart.

    schemas.txt       38 databases with the words that people use for their columns, written by hand
    phrasings.py      the ways to ask, written by hand, apart for train, validation and test
    generate.py       rows, queries and questions from a seed
    near_misses.py    the wrong queries that the rows must tell from the right one

`python -m recipes.sql_questions` writes data/sql again, byte for byte.
"""
