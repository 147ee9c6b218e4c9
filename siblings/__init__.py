"""Other algorithms, each as its difference from dapo.py: python -m siblings.gspo takes all it takes."""
