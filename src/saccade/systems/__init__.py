"""Published systems, one file each: ``systems/<family>/<slug>.py``.

Nobody keeps a list: :mod:`saccade.catalog` walks this package, and a class that derives from
:class:`saccade.systems.base.System` is in the catalogue.
"""
