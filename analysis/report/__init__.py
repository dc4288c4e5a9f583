"""`python -m analysis.report`: a run or a study as one page that can be clicked through, without a network."""
