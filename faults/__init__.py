"""The fault lab: real commands on the pocket base, hurt from outside, and what they lost.

An experiment is a function of a `Lab` that yields `Finding`s; `experiments.py` lists them all.
"""
