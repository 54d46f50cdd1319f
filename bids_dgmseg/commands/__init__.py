"""The verbs of `dgmseg`, one small file each."""
