"""Nipype interfaces and workflow builders."""
