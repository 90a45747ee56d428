"""Captioned clips: procedural ones with the tracker that scores a clip against its caption, and folders of videos."""
