"""Procedural captioned clips and the tracker that scores a clip against its caption."""
