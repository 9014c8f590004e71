"""Networks that look at pictures: control images, detectors, classifiers; run in a process of their own, on the CPU."""
