"""The analytic phantom, its demo dataset, and the writing of labelled datasets."""
