"""People's judgement of what models wrote: blind, planned, counted once, with its doubt.

settings.py   what a person can say about a study
criteria.py   the scales of a rating, finespun's and one's own
design.py     who judges what, in which order and on which side; practice and attention checks
study.py      outputs and settings become a study, which never changes afterwards
store.py      the file of a study: the study itself and what happened, events that are only ever added
app.py        the pages that people see (words.py in their language, pages/ their layout)
server.py     the process that serves them
analysis.py   answers become results: preferences, strengths, agreement, attention
report.py     results for a terminal, a page and other programs; judged pairs as training data
"""
