"""Other algorithms, each as its difference from dapo.py. Run them from the repository root: python -m siblings.NAME"""
