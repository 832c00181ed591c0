"""Chooses the memory options with which a run fits a device and finishes soonest: predicted bytes, modelled seconds."""
