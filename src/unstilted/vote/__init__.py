"""The blind vote: a study frozen beforehand, a site for raters, and votes that can't be forged, replayed or lost."""
