"""Models, fakes, rigs and tolerances that tests share."""
