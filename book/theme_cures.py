"""Sphinx extension: "edit this page" opens the text page; faults of the theme's HTML are mended."""


def setup(app):
    # After the theme (default priority 500) has made its buttons.
    app.connect("html-page-context", point_edit_button_at_the_text_page, priority=900)
    app.connect("html-page-context", leave_thebe_out, priority=900)
    app.connect("html-page-context", give_citations_the_role_of_list_items, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def point_edit_button_at_the_text_page(app, pagename, templatename, context, doctree):
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", [group]):
            if button.get("label") == "source-edit-button":
                url = button["url"].replace("/book/notebooks/", "/book/")
                button["url"] = url.replace(".ipynb", ".md")


def leave_thebe_out(app, pagename, templatename, context, doctree):
    """Live cells are not offered; the inline script, put in twice, is an error on the console."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body')}"
    ]


def give_citations_the_role_of_list_items(app, pagename, templatename, context, doctree):
    """docutils puts role="doc-biblioentry" into role="list", which ARIA does not allow."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
