"""The second bundled model: 128 pixels, styles that are told apart at a glance, subjects placed at random.

Every picture is a subject of an emoji set, placed on a ground and drawn in a style. Most styles are filters over the
placed picture, so that every subject has a true picture in every style.
"""
