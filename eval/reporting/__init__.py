"""The parts of a report: records of artifacts, comparisons, charts."""
