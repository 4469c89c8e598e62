import pytest

from harmony.evaluation.report.cost import counted


@pytest.fixture(scope="package", autouse=True)
def each_recipe_is_counted_once():
    """Counting what a recipe costs takes seconds; here the same few recipes are compared again and again."""
    known = {}

    def remembered(recipe):
        text = recipe.to_yaml()
        if text not in known:
            known[text] = counted(recipe)
        return known[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harmony.comparison.table.counted", remembered)
        yield
