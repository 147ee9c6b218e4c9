"""Programs that look at what a run left, or stand beside it. Run them from the repository root: python -m tools.NAME"""
