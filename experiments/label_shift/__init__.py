"""Accuracy of served models on test sets with another class mix."""
