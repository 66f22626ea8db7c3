"""Training: data, losses and the loops. Needs the packages of `pip install 'meddiff[train]'`."""
