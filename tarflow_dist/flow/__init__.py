"""The mathematics of TARFlow ("Normalizing Flows are Capable Generative Models", arXiv 2412.06329).

Torch only: no files, no ranks, no config objects, no logging. Wrong arguments raise `ValueError`.
"""
