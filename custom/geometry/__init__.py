"""Shapes on grids: deformation, registration, topology, centre lines, vessels. Labels and tensors only."""
