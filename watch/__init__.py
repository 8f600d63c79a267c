"""Who looks on while a run goes on, and what is seen of it: nothing here changes a number that a run computes.

observer.py            the one that a run tells of its steps and epochs; it tells the others
events.py              TensorBoard's events
alphas.py              the alphas over the epochs: tables, curves, a heat map
curves.py              accuracy and loss, the sharpness of a search
cost.py                what a run will take, and what it took
evaluation.py          what a network does with its test images; evaluation_figures.py draws it
report.jinja           how the page looks that report.py makes
"""
