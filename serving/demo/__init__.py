"""``penstock demo``: the whole stack on one machine, in parallel, watched, and gone without a trace
afterwards.

Two processes look after it. The *guard* (:mod:`penstock.serving.demo.guard`) is what the user started; it
starts the *supervisor* (``python -m penstock.serving.demo``), which starts the parts. Each adopts the
orphans below it and can clean up after the other's death; what outlives both is found and ended by the next
start through the run's folder.
"""
