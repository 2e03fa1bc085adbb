/*
 * Tests with a fixture that register themselves
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Before it defines tests, a program defines
 * - Test, the fixture, and TestConfig, which describes it;
 * - set_up() and tear_down(), which have the parameters of a test.
 */

#ifndef TESTS_UNIT_FIXTURE_H
#define TESTS_UNIT_FIXTURE_H

typedef struct FixtureTest {
    const char *name;
    GTestFixtureFunc func;
    const char *configs;
    size_t nb_configs;
} FixtureTest;

static GArray *fixture_tests;

static void fixture_register(FixtureTest test)
{
    if (!fixture_tests) {
        fixture_tests = g_array_new(false, false, sizeof(test));
    }
    g_array_append_val(fixture_tests, test);
}

/* Define a test that is run with each of some TestConfigs, or with one */
#define FIXTURE_CASES(name, ...)                                        \
    static void test_##name(Test *t, const TestConfig *config);         \
    static void __attribute__((constructor)) register_##name(void)      \
    {                                                                   \
        static const TestConfig configs[] = { __VA_ARGS__ };            \
                                                                        \
        fixture_register((FixtureTest) {                                \
            #name, (GTestFixtureFunc)test_##name,                       \
            (const char *)configs, ARRAY_SIZE(configs),                 \
        });                                                             \
    }                                                                   \
    static void test_##name(Test *t, const TestConfig *config)
#define FIXTURE_TEST(name, ...) FIXTURE_CASES(name, { __VA_ARGS__ })

/* Give all tests their names, which begin with @group, a string */
#define fixture_add_tests(group)                                        \
    fixture_add(group, sizeof(Test), sizeof(TestConfig),                \
                (GTestFixtureFunc)set_up, (GTestFixtureFunc)tear_down)

static void fixture_add(const char *group, size_t size, size_t config_size,
                        GTestFixtureFunc set_up, GTestFixtureFunc tear_down)
{
    for (guint i = 0; i < fixture_tests->len; i++) {
        FixtureTest *test = &g_array_index(fixture_tests, FixtureTest, i);

        for (size_t k = 0; k < test->nb_configs; k++) {
            g_autofree char *path = test->nb_configs == 1 ?
                g_strdup_printf("%s/%s", group, test->name) :
                g_strdup_printf("%s/%s/%zu", group, test->name, k);

            g_test_add_vtable(g_strdelimit(path, "_", '-'), size,
                              test->configs + k * config_size, set_up,
                              test->func, tear_down);
        }
    }
    g_array_unref(fixture_tests);
}

#endif /* TESTS_UNIT_FIXTURE_H */
