"""The ground floor: errors, strict configs, atomic files, seeds, weights. It imports no room."""
