"""Rows and pictures: manifest, order, samples, batches, faults. Import from the modules; nothing heavy loads here."""
