"""The fusion rules compared on many pairs of a subject and a style, with intervals: which rule earns its place."""
