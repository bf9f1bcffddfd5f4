"""What figures, the report and the command line have in common, without plotly.

Tokens as labels, one head's maps on one example, names and colours of methods, numbers in few
characters; and paths, as a picture of its own.
"""
