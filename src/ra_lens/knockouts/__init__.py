"""Attention knockouts: cut edges of attention, foretold from one backward pass or really done.

predict.py   what a cut does to the loss, to first order
"""
