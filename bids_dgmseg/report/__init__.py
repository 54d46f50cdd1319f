"""Figures and pages to judge a scan by."""
