"""A module that cannot be imported, for want of something that is no package."""

raise OSError(2, "libmine.so: cannot open shared object file")
